# Two images from one file. The service never holds torch; the trainer never holds FastAPI.
#
#   docker build -t engram-service .
#   docker build -t engram-trainer --target trainer .                    PyTorch as PyPI has it: with CUDA on x86
#   docker build -t engram-trainer --target trainer --build-arg TORCH=torch==2.13.0+cpu \
#     --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .       for CPUs alone: 1.3 GB, not 5.1
#
# What Engram needs is installed before Engram is copied, so that an edit installs nothing anew. constraints.txt has the
# versions of everything but PyTorch and what comes with it.

FROM python:3.12-slim AS requirements
WORKDIR /source
RUN python -m venv /opt/engram
COPY pyproject.toml constraints.txt ./
# What an extra needs, those of Engram's own extras that it names included.
RUN printf '%s\n' \
  'import sys, tomllib' \
  'project = tomllib.load(open("pyproject.toml", "rb"))["project"]' \
  'extras = project["optional-dependencies"]' \
  'found = [*project["dependencies"], *(each for name in sys.argv[1:] for each in extras[name])]' \
  'print(*(each for each in found if not each.startswith("engram[")), sep="\n")' > requirements.py

FROM requirements AS service-requirements
RUN python requirements.py cli service postgres > requirements.txt \
 && /opt/engram/bin/pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt

FROM requirements AS trainer-requirements
ARG TORCH=torch==2.13.0
ARG PIP_EXTRA_INDEX_URL=
RUN /opt/engram/bin/pip install --no-cache-dir --constraint constraints.txt "${TORCH}" \
 && python requirements.py cli trainer > requirements.txt \
 && /opt/engram/bin/pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt

FROM service-requirements AS service-build
COPY README.md LICENSE ./
COPY client client
COPY service service
COPY trainer trainer
COPY migrations migrations
RUN /opt/engram/bin/pip install --no-cache-dir --no-deps .

FROM trainer-requirements AS trainer-build
COPY README.md LICENSE ./
COPY client client
COPY service service
COPY trainer trainer
COPY migrations migrations
RUN /opt/engram/bin/pip install --no-cache-dir --no-deps . \
 && cp -r trainer/engram_trainer/data /opt/engram/lib/python3.12/site-packages/engram_trainer/

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
