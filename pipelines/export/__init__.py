"""Export a trained model to timm, torch.export and ONNX."""
