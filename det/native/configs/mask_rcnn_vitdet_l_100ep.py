# ViTDet's Mask R-CNN with ViT-L, 1024 px, 100 epochs of COCO: box AP 54.6, mask AP 48.2 with ADDP in the paper (not
# reproduced by us).
#
# Source: App. D of the paper. The learning rate is illegible in our copy of the paper; 1.6e-4 is our choice.
# Run:    python -m det.native.train_net --config-file mask_rcnn_vitdet_l_100ep --num-gpus 8 --num-machines 8 \
#             --machine-rank 0 --dist-url tcp://<first machine>:29500 train.output_dir=runs/det_l \
#             dataloader.coco.root=datasets/coco model.backbone.net.encoder.source=runs/vit_l
#         If memory is short, add model.backbone.net.checkpointing=true.
from .common.vitdet import dataloader, lr_multiplier, model, optimizer, train

model.backbone.net.encoder.source = "hf://Changyao/ADDP/addp-vit-large-16.pth"
model.backbone.net.encoder.drop_path = 0.4
optimizer.params.layer_decay = 0.9

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]
