"""The handler that a tutorial ends with: FastAPI, Pillow, one run of the model for each request."""

import sys

import uvicorn
from classifier import Classifier, Prediction
from fastapi import FastAPI, Request, UploadFile

app, classify = FastAPI(), Classifier()


@app.post("/predict")
async def predict(image: UploadFile) -> Prediction:
    return classify([await image.read()])[0]


@app.post("/raw")
async def predict_raw(request: Request) -> Prediction:
    return classify([await request.body()])[0]


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), access_log=False, log_level="warning")
