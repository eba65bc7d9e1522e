"""An export in the engines that serve it: what each makes of the same tokens."""
