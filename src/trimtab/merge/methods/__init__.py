"""The merging methods, one file each; `trimtab.merge.METHODS` lists them."""
