# addp with every task but detectron2's engine. From the index, PyTorch comes with CUDA and also runs without a GPU:
#
#   docker build -t addp .
#   docker run --rm --gpus all --shm-size 16g --user "$(id -u):$(id -g)" -v "$PWD:/work" addp pretrain tiny data=photos out=runs/tiny
#
# For CPUs alone, PyTorch's own index has a build of a tenth of the size:
#
#   docker build -t addp:cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
FROM python:3.11-slim

ARG TORCH_INDEX=https://pypi.org/simple
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HOME=/tmp

# OpenCV, which mmsegmentation reads images with, needs these two.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

# PyTorch has a layer of its own: a change of the project does not install it again.
COPY constraints.txt /addp/
RUN torch=$(grep -E '^torch==.*>= "3.11"' /addp/constraints.txt | cut -d';' -f1) \
    && torchvision=$(grep -E '^torchvision==.*>= "3.11"' /addp/constraints.txt | cut -d';' -f1) \
    && pip install --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple "$torch" "$torchvision"

COPY . /addp
RUN pip install -c /addp/constraints.txt "/addp[gen,det,seg,stream]"

WORKDIR /work
ENTRYPOINT ["addp"]
CMD ["--help"]
