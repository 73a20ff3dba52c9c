# The environment; code, data and runs stay in this directory:
#     docker build -t mosaicbert .
#     docker run --rm --gpus=all --ipc=host -v "$PWD":/mosaicbert mosaicbert python train.py configs/base.py
# Not python:3.11-slim: Triton compiles with gcc and Python's headers. --ipc=host: NCCL shares memory between processes.
FROM python:3.11
WORKDIR /mosaicbert
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir -r requirements.txt -c constraints.txt
# The mounted directory may belong to somebody else; the log names its commit all the same.
RUN git config --system --add safe.directory /mosaicbert
