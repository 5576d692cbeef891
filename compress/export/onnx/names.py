"""What the files of an ONNX export are called."""

MODEL, DATA, EXACT = "model.onnx", "model.onnx.data", "exact.onnx"
