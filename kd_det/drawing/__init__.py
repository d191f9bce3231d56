"""Pictures that several tools draw; it needs torchvision and matplotlib."""
