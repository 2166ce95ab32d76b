# Export, verification, benchmarks and the quickstart, on a CPU.
#
#   docker build -f docker/cpu.Dockerfile -t distillabse:cpu .
#   docker run --rm -v "$PWD:/job" distillabse:cpu run quickstart output=/job/runs
FROM python:3.12-slim-bookworm

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH HF_HOME=/job/.cache/huggingface

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY distillabse distillabse
RUN pip install --no-cache-dir --constraint constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0 '.[cpu,demo]'

WORKDIR /job
ENTRYPOINT ["distillabse"]
CMD ["--help"]
