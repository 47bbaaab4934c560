# `serve` in a container: packages from the registries, a user without rights, no weights inside.
#
#   docker build -t higgs-voice-serve .
#   docker run --gpus all -p 127.0.0.1:8000:8000 -v "$PWD/out/merged:/model:ro" -v voices:/voices \
#       -e SERVE_API_KEY=... higgs-voice-serve
#
# The codec is the one that the merged folder remembers: a hub id is fetched at the first start (keep /home/voice/.cache in a
# named volume, which takes its owner from the folder here), a folder must be mounted at the same path.
FROM python:3.11-slim

RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 voice && mkdir -p /voices /home/voice/.cache/huggingface \
    && chown -R voice /voices /home/voice/.cache
WORKDIR /app
COPY pyproject.toml constraints.txt README.md higgs_voice_pipeline.py ./
COPY preprocess preprocess
COPY shards shards
COPY tools tools
COPY train train
RUN pip install --no-cache-dir -c constraints.txt -e '.[serve]'

USER voice
ENV HF_HOME=/home/voice/.cache/huggingface PYTHONUNBUFFERED=1
VOLUME ["/voices"]
EXPOSE 8000
# The port is published by the one who starts it, above only to this machine. SIGTERM is what docker stop sends.
HEALTHCHECK --start-period=5m --interval=15s CMD \
    python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"
STOPSIGNAL SIGTERM
ENTRYPOINT ["serve"]
CMD ["/model", "--host", "0.0.0.0", "--port", "8000", "--voices", "/voices"]
