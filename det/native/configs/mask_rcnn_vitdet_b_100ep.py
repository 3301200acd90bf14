# ViTDet's Mask R-CNN with ViT-B, 1024 px, 100 epochs of COCO: box AP 51.7, mask AP 45.8 with ADDP in the paper (not
# reproduced by us).
#
# Source: App. D of the paper. The learning rate is illegible in our copy of the paper; 1.6e-4 is our choice.
# Run:    python -m det.native.train_net --config-file mask_rcnn_vitdet_b_100ep --num-gpus 8 \
#             train.output_dir=runs/det_b dataloader.coco.root=datasets/coco \
#             model.backbone.net.encoder.source=runs/vit_b
#         Baseline from random weights: model.backbone.net.encoder.init=random.
from .common.vitdet import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]
