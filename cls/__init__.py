"""Classification: fine-tuning, linear probing and robustness (App. D.2).

Importing this package registers the `addp_vit_*` models with timm.
"""

from cls import registry as registry
