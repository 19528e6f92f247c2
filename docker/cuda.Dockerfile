# moextend_jax for NVIDIA GPUs, from the repository: docker build -f docker/cuda.Dockerfile -t REGISTRY/moextend:cuda .
# CUDA 12's libraries come with jax; the host brings the driver: docker run --gpus all --shm-size 8g ... moextend run ...
FROM python:3.12-slim

# What the NVIDIA container runtime is to bring in, on hosts that are not told by --gpus.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /moextend
COPY pyproject.toml requirements.txt constraints.txt README.md LICENSE ./
COPY configs configs
COPY moextend_jax moextend_jax
RUN pip install --no-cache-dir -c constraints.txt ".[gpu,gcs]" && moextend --version

# The command of a JobSet or of `docker run` stands in its place: `moextend run ...`
CMD ["moextend", "doctor"]
