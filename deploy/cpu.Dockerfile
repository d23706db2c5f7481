# Image of all roles without CUDA, for the embedded recipes and for trying manifests out:
#   docker build -f deploy/cpu.Dockerfile -t euphonium:cpu .
FROM python:3.11.14-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# A compiler: DeepSpeed builds its shared-memory collective for CPUs when it first needs it.
# hadolint ignore=DL3008
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      git g++ rsync openssh-client \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home --shell /bin/bash euphonium \
    && install -d -o euphonium -g euphonium /opt/venv /opt/euphonium /shared

USER 1000
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 RAY_AUTH_MODE=token

WORKDIR /opt/euphonium
COPY --chown=1000:1000 pyproject.toml requirements.lock README.md LICENSE ./
# torch first: DeepSpeed's build imports it.
RUN grep -E '^torch==' requirements.lock \
      | xargs pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu \
    && grep -E '^(setuptools|wheel|ninja|py-cpuinfo|packaging)==' requirements.lock | xargs pip install --no-cache-dir \
    && DS_BUILD_OPS=0 pip install --no-cache-dir --no-build-isolation -r requirements.lock
COPY --chown=1000:1000 . .
RUN pip install --no-cache-dir --no-build-isolation --no-deps -e .
CMD ["euphonium", "--help"]
