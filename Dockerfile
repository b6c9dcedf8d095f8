# The CUDA wheels of torch carry the CUDA libraries, so the base is the same for both builds:
#   docker build -t vsd-serve .                          NVIDIA GPU
#   docker build -t vsd-serve --build-arg TORCH=cpu .    CPU only; see constraints/cpu.txt for PIP_EXTRA_INDEX_URL
FROM python:3.12-slim AS build
ARG TORCH=cuda
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
# The dependencies are a layer of their own: a change of the source does not install torch again.
COPY pyproject.toml README.md LICENSE ./
COPY constraints constraints
RUN pip install --constraint constraints/$TORCH.txt .
COPY server server
COPY kernels kernels
COPY drafts drafts
COPY tools tools
RUN pip install --no-deps --force-reinstall .

FROM python:3.12-slim
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/home/vsd
# Every cache, downloaded models among them, lies under the home directory.
RUN useradd --uid 1001 --create-home vsd
# Kernels are compiled where they run: by Triton for a GPU, by kernels/cpu.py for the processor.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/venv /opt/venv
USER 1001
WORKDIR /home/vsd
EXPOSE 8000
# Loading a large model takes minutes; until it is ready the checks do not count.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["python", "-m", "server"]
# Whoever publishes the port decides who can reach it; VSD_API_KEY asks for a key.
CMD ["--host", "0.0.0.0", "--allow-unauthenticated"]
