# Two images from one recipe: `docker build --target cpu .` and `docker build --target cuda .`
# The registry's usual torch brings CUDA with it. For a small CPU image give the index of torch's CPU builds:
#   docker build --target cpu --build-arg TORCH_INDEX=... -t sumuk:cpu .
FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/sumuk
RUN useradd --create-home --uid 1000 sumuk && mkdir /state /models && chown sumuk /state
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src

FROM base AS cpu
ARG TORCH_INDEX=""
RUN pip install -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
    && pip install -c constraints.txt '.[ui,safety,sign]'
USER 1000
VOLUME ["/state"]
EXPOSE 7860
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:7860/livez', timeout=5)"]
# SUMUK_TOKENS (NAME=SECRET, commas between) must be given: off loopback the server does not start without.
ENTRYPOINT ["sumuk", "serve", "--host", "0.0.0.0", "--state", "/state", "--shelf", "/models", "--log", "json"]

FROM base AS cuda
RUN pip install -c constraints.txt '.[ui,safety,sign]'
USER 1000
VOLUME ["/state"]
EXPOSE 7860
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:7860/livez', timeout=5)"]
ENTRYPOINT ["sumuk", "serve", "--host", "0.0.0.0", "--state", "/state", "--shelf", "/models", "--log", "json", "--device", "cuda"]
