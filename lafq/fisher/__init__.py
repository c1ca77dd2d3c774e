"""Fisher information of the weights of any network, empirical or true, and its curvature."""
