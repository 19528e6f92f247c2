# moextend_jax for TPU hosts, from the repository: docker build -f docker/tpu.Dockerfile -t REGISTRY/moextend:tpu .
# A pod needs the TPU resource, which launch/gke.py asks for; a container on a TPU VM --privileged --network host.
FROM python:3.12-slim

WORKDIR /moextend
COPY pyproject.toml requirements.txt constraints.txt README.md LICENSE ./
COPY configs configs
COPY moextend_jax moextend_jax
# tpu: the libtpu of the JAX that is then there.
RUN pip install --no-cache-dir -c constraints.txt ".[gcs]" \
    && pip install --no-cache-dir -c requirements.txt ".[tpu]" \
    && moextend --version

# The command of a JobSet or of XPK stands in its place: `moextend run ...`
CMD ["moextend", "doctor"]
