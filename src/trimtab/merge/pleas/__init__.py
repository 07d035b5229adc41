"""PLeaS: two networks into one of any size between one and two. `pleas.py` is the method; the other files are its parts."""
