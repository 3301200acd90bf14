"""The two engines: Mask R-CNN of torchvision and of detectron2, each a `det.model.Detector` over the same encoder."""
