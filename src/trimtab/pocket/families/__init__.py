"""The eight task families of the pocket world, by name."""

from __future__ import annotations

from trimtab.pocket.families.advice import Advice
from trimtab.pocket.families.base import Family
from trimtab.pocket.families.comfort import Comfort
from trimtab.pocket.families.fact import Fact
from trimtab.pocket.families.harm import Harm
from trimtab.pocket.families.lists import Lists
from trimtab.pocket.families.review import Review
from trimtab.pocket.families.sums import Sum
from trimtab.pocket.families.translate import Translate

FAMILIES: dict[str, Family] = {
    family.name: family for family in (Fact(), Review(), Sum(), Harm(), Advice(), Lists(), Translate(), Comfort())
}
