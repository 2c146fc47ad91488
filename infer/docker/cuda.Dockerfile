# fact-infer serve on an NVIDIA GPU, one process for each. Build from the repository's root:
#   docker build -f infer/docker/cuda.Dockerfile -t fact-jax:cuda .
#   docker run --rm --gpus device=0 -p 127.0.0.1:8000:8000 -v /srv/models:/models:ro fact-jax:cuda \
#     serve --host 0.0.0.0 --backend torch --precision float16 --merge 4 \
#     --base /models/base --adapter /models/adapter.safetensors --encoder /models/encoder
# The driver comes from the host (nvidia-container-toolkit); CUDA's libraries come with the wheels.
FROM python:3.11-slim

WORKDIR /app
COPY . .
RUN pip install --no-cache-dir -c constraints.txt ".[ui,torch,cuda]" \
    && useradd --create-home --uid 1000 fact

# A number: Kubernetes cannot tell whether a name is root.
USER 1000
# JAX takes memory as it needs it: PyTorch or a second process may want some.
ENV XLA_PYTHON_CLIENT_PREALLOCATE=false
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=300s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz')"]
ENTRYPOINT ["fact-infer"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
