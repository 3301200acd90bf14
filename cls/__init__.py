"""Classification: fine-tuning, linear probing, robustness (App. D.2). Importing this makes timm know `addp_vit_*`."""

from cls import registry as registry
