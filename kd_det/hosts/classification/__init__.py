"""The classification host: image classifiers, on small images (CIFAR) and large (ImageNet)."""
