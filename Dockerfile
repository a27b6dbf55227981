# docker build -t dp-image-bench . && docker run --gpus all -v "$PWD/exp:/app/exp" -v "$PWD/dataset:/app/dataset" \
#     dp-image-bench --method PrivImage --data_name digits_8 --epsilon 10
FROM python:3.12-slim
WORKDIR /app
RUN apt-get update && apt-get install --yes --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
ENTRYPOINT ["python", "run.py"]
