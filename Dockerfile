# CPU:  docker build -t flowtilt .
# CUDA: docker build -t flowtilt:cuda --build-arg TORCH=cu130 .     run it with --gpus all
FROM python:3.12-slim
ARG TORCH=cpu
RUN apt-get update && apt-get install --yes --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /flowtilt
COPY . .
RUN pip install --no-cache-dir --extra-index-url "https://download.pytorch.org/whl/${TORCH}" --constraint constraints.txt '.[rewards,serve,pairs]'
ENV HF_HOME=/cache/huggingface
VOLUME ["/cache", "/work"]
WORKDIR /work
ENTRYPOINT ["flowtilt"]
CMD ["--help"]
