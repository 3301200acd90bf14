"""Classification: fine-tuning, linear probing and robustness (App. D.2).

Importing this package registers the `addp_vit_*` models with timm, except where the command line needs no more of it
than the keys of a recipe.
"""

from addp_core.recipes.verbs import reading_recipe

if not reading_recipe():
    from cls import registry as registry
