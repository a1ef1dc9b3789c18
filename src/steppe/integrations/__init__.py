"""What the trainers people use need to run a sharpness-aware step: one file for each."""
