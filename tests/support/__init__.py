"""What tests share: models, dense references, small matrices, tolerances."""
