# Export, verification, benchmarks, encoding and the quickstart, on a CPU. See docker/README.md.
#
#   docker build -f docker/cpu.Dockerfile -t distillabse:cpu .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/job" distillabse:cpu run quickstart output=/job/runs
FROM python:3.12-slim-bookworm

# The CPU build of torch; from PyPI the same version brings several GB of CUDA libraries.
ARG PIP_EXTRA="--extra-index-url https://download.pytorch.org/whl/cpu"
ENV PIP_NO_CACHE_DIR=1

# Dependencies first: this layer stays while only the source changes.
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY docker/install.sh docker/
COPY distillabse/__init__.py distillabse/
RUN mkdir configs && docker/install.sh cpu /opt/venv

COPY configs configs
COPY distillabse distillabse
RUN docker/install.sh cpu /opt/venv

# Caches lie where any user may write: --user gives the products to whoever starts the container.
ENV PATH=/opt/venv/bin:$PATH \
    HF_HOME=/job/.cache/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib
RUN useradd --create-home --uid 1000 distillabse && install --directory --owner distillabse /job
USER 1000
WORKDIR /job
ENTRYPOINT ["distillabse"]
CMD ["--help"]
