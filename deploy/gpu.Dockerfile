# Image of all roles, for GPU nodes: docker build -f deploy/gpu.Dockerfile -t euphonium:latest .
# The packages are those of requirements.lock; PyPI's torch of that version is the one for CUDA 13.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# ibverbs and rdma: NCCL's InfiniBand and RoCE transport. DeepSpeed compiles kernels when it first needs them.
# hadolint ignore=DL3008
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      python3 python3-dev python3-venv git rsync openssh-client \
      libibverbs1 ibverbs-providers librdmacm1 rdma-core \
    && rm -rf /var/lib/apt/lists/* \
    && (userdel --remove ubuntu 2> /dev/null || true) \
    && useradd --uid 1000 --create-home --shell /bin/bash euphonium \
    && install -d -o euphonium -g euphonium /opt/venv /opt/euphonium /shared

USER 1000
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 RAY_AUTH_MODE=token

WORKDIR /opt/euphonium
COPY --chown=1000:1000 pyproject.toml requirements.lock README.md LICENSE ./
# torch first: DeepSpeed's build imports it.
RUN grep -E '^(torch|setuptools|wheel|ninja|py-cpuinfo|packaging)==' requirements.lock \
      | xargs pip install --no-cache-dir \
    && DS_BUILD_OPS=0 pip install --no-cache-dir --no-build-isolation -r requirements.lock
COPY --chown=1000:1000 . .
RUN pip install --no-cache-dir --no-build-isolation --no-deps -e .
CMD ["euphonium", "--help"]
