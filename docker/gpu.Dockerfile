# Training on NVIDIA GPUs, one or many.
#
#   docker build -f docker/gpu.Dockerfile -t distillabse:gpu .
#   docker run --gpus all --rm -v "$PWD:/job" distillabse:gpu run labse-opensubtitles output=/job/runs
#
# The devel image holds the compiler with which DeepSpeed builds its operators at first use.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv ninja-build \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH HF_HOME=/job/.cache/huggingface TORCH_EXTENSIONS_DIR=/opt/torch_extensions

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY distillabse distillabse
RUN pip install --no-cache-dir --constraint constraints.txt torch==2.13.0 '.[gpu,deepspeed,eval,demo]'

WORKDIR /job
ENTRYPOINT ["distillabse"]
CMD ["--help"]
