"""Fine-tune: python train.py model=resnet50 data=cifar10."""

from finetune.train import main

if __name__ == "__main__":
    main()
