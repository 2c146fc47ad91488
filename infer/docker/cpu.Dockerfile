# fact-infer serve on a CPU, with the shipped miniature. Build from the repository's root:
#   docker build -f infer/docker/cpu.Dockerfile -t fact-jax:cpu .
#   docker run --rm -p 127.0.0.1:8000:8000 fact-jax:cpu
# The page instead: docker run --rm -p 127.0.0.1:8000:8000 fact-jax:cpu ui --host 0.0.0.0 --port 8000
FROM python:3.11-slim

WORKDIR /app
COPY . .
# PyTorch of its own index first: that of PyPI brings several GB of CUDA.
RUN pip install --no-cache-dir -c constraints.txt torch --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir -c constraints.txt ".[ui,torch]" \
    && useradd --create-home --uid 1000 fact

# A number: Kubernetes cannot tell whether a name is root.
USER 1000
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz')"]
ENTRYPOINT ["fact-infer"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
