# Training on NVIDIA GPUs: one, several, or several nodes. See docker/README.md.
#
#   docker build -f docker/train.Dockerfile -t distillabse:train .
#   docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD:/job" distillabse:train doctor --device cuda
#
# The devel image has nvcc: DeepSpeed builds its operators at first use, with nvcc, g++ and ninja.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

# g++ ninja-build python3-dev: DeepSpeed's operators. libibverbs1 ibverbs-providers librdmacm1: NCCL over InfiniBand and
# RoCE. numactl: deepspeed --bind_cores_to_rank. pdsh openssh-*: the deepspeed launcher where it goes from node to node
# by itself; torchrun and Slurm need none of them.
# Ubuntu keeps only the newest build of a package in its archive, so a pinned version would break the build in weeks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        g++ ninja-build python3 python3-dev python3-venv \
        ibverbs-providers libibverbs1 librdmacm1 numactl \
        openssh-client openssh-server pdsh \
    && rm -rf /var/lib/apt/lists/*

ARG PIP_EXTRA=""
ENV PIP_NO_CACHE_DIR=1

# Dependencies first: this layer stays while only the source changes.
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY docker/install.sh docker/
COPY distillabse/__init__.py distillabse/
RUN mkdir configs && docker/install.sh gpu /opt/venv

COPY configs configs
COPY distillabse distillabse
RUN docker/install.sh gpu /opt/venv

# Caches lie where any user may write: --user, enroot and apptainer run the image as whoever starts it, and apptainer
# gives it nothing of its own to write to. NCCL_DEBUG=WARN names what went wrong instead of hanging in silence.
ENV PATH=/opt/venv/bin:$PATH \
    HF_HOME=/job/.cache/huggingface \
    TORCH_EXTENSIONS_DIR=/tmp/torch_extensions \
    TRITON_CACHE_DIR=/tmp/triton \
    MPLCONFIGDIR=/tmp/matplotlib \
    NCCL_DEBUG=WARN

# Ubuntu's own image has a user 1000 already.
RUN if id ubuntu; then userdel --remove ubuntu; fi \
    && useradd --create-home --uid 1000 --shell /bin/bash distillabse \
    && install --directory --owner distillabse /job
USER 1000
WORKDIR /job
ENTRYPOINT ["distillabse"]
CMD ["--help"]
