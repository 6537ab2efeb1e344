"""The handler that a tutorial ends with: FastAPI, Pillow, one run of the model for each request."""

import sys

import uvicorn
from classifier import Answer, Classifier, decode
from fastapi import FastAPI, Request, UploadFile

app, classify = FastAPI(), Classifier()


@app.post("/predict")
async def predict(image: UploadFile) -> Answer:
    return classify([decode(await image.read())])[0]


@app.post("/raw")
async def predict_raw(request: Request) -> Answer:
    return classify([decode(await request.body())])[0]


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), access_log=False, log_level="warning")
