# docker build -t alignprop .
# docker run --gpus all --rm -v "$PWD/logs:/runs/logs" alignprop train --config hps
FROM nvidia/cuda:12.9.1-base-ubuntu24.04

# Ubuntu keeps no older versions that could be named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/alignprop/bin:$PATH
WORKDIR /src
COPY requirements.txt ./
RUN python3 -m venv /opt/alignprop && pip install --no-cache-dir -r requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps .

WORKDIR /runs
ENTRYPOINT ["alignprop"]
