# Two images from one file. The service never holds torch; the trainer never holds FastAPI.
#
#   docker build -t engram-service .
#   docker build -t engram-trainer --target trainer .

FROM python:3.12-slim AS source
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY service service
COPY trainer trainer
COPY migrations migrations
RUN python -m venv /opt/engram

FROM source AS service-build
RUN /opt/engram/bin/pip install --no-cache-dir ".[service]"

FROM source AS trainer-build
ARG TORCH=torch==2.13.0
RUN /opt/engram/bin/pip install --no-cache-dir "${TORCH}" && /opt/engram/bin/pip install --no-cache-dir ".[trainer]"

FROM python:3.12-slim AS base
RUN groupadd --gid 10001 engram \
 && useradd --uid 10001 --gid engram --home-dir /data --no-create-home --shell /usr/sbin/nologin engram \
 && install -d -o engram -g engram /data
ENV PATH=/opt/engram/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /data
VOLUME /data

FROM base AS trainer
COPY --from=trainer-build /opt/engram /opt/engram
USER engram
ENTRYPOINT ["engram-train"]
CMD ["--help"]

FROM base AS service
COPY --from=service-build /opt/engram /opt/engram
USER engram
# Any address but loopback needs ENGRAM_ADMIN_TOKEN; without it the service refuses to start.
ENV ENGRAM_HOST=0.0.0.0 ENGRAM_PORT=8077 ENGRAM_DATA_DIR=/data
EXPOSE 8077
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ['ENGRAM_PORT']}/readyz\", timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["engram-service"]
CMD ["serve"]
