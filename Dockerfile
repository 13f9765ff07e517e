# flowrl for CPUs or for CUDA, with the packages that scripts/setup.sh installs:
#
#     docker build -t flowrl:cpu .
#     docker build -t flowrl:cuda --build-arg DEVICE=gpu --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 .
#     docker run --shm-size=4g flowrl:cpu flowrl run graphs/ppo_async.py
ARG BASE=ubuntu:24.04
FROM ${BASE}
ARG DEVICE=cpu
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev build-essential git libnuma1 wget \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY . .
# ray[default] has what a RayJob and `ray job submit` talk to, and Ray alone has not.
RUN bash scripts/setup.sh "${DEVICE}" \
    && .venv/bin/python -m pip install --constraint scripts/constraints-cpu.txt "ray[default]>=2.60,<2.61" \
    && rm -rf .setup
ENV PATH=/app/.venv/bin:${PATH}
# No HEALTHCHECK: a Ray node's health is the head's business.
CMD ["flowrl", "doctor"]
