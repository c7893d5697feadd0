"""Take a trained model elsewhere: to timm, to torch.export, to ONNX."""
