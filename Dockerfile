# docker build -t lafq . && docker run --rm -it lafq make reproduce
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /lafq
COPY . .
RUN make setup
CMD ["make", "help"]
