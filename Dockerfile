# The repository with what its stages need, on the CPU:
#   docker build -t megatransformer .
#   docker run --rm -v "$PWD/runs:/megatransformer/runs" -v "$PWD/cached_datasets:/megatransformer/cached_datasets" \
#       megatransformer python pretrain_image_vae.py --help
# For NVIDIA GPUs, with `docker run --gpus all`: PyPI's wheels of PyTorch bring CUDA's libraries, the host its driver.
#   docker build -t megatransformer:cuda --build-arg PIP_EXTRA_INDEX_URL= --build-arg SYSTEM="gcc libc6-dev" .
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# The wheels of this index have versions such as 2.11.0+cpu, which pip prefers to PyPI's.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# Further packages: names of requirements-NAME.txt, and of Debian's. --compile_model needs a C compiler.
ARG EXTRAS="demo"
ARG SYSTEM=""

# Debian's versions belong to the image, and are not pinned.
# hadolint ignore=DL3008
RUN if [ -n "${SYSTEM}" ]; then \
        apt-get update && apt-get install --yes --no-install-recommends ${SYSTEM} && rm -rf /var/lib/apt/lists/*; \
    fi

WORKDIR /megatransformer
COPY requirements*.txt ./
RUN pip install --no-cache-dir -r requirements.txt \
    && for extra in ${EXTRAS}; do pip install --no-cache-dir -r "requirements-${extra}.txt" || exit 1; done

# Files in mounted folders belong to user 1000, the first one of most machines.
RUN useradd --create-home --uid 1000 trainer && chown trainer .
COPY --chown=1000 . .
USER 1000
CMD ["python", "evaluate.py", "--help"]
