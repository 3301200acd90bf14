"""Detection: ViTDet Mask R-CNN on COCO, on detectron2 where it is installed and on torchvision everywhere."""
