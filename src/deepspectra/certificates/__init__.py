"""PAC-Bayes certificates: upper bounds on the error on unseen data, from posteriors in the curvature's own basis."""
