"""ONNX files: a model traced, packed layers as operators of a runtime, written and run. Imported when it is wanted."""
