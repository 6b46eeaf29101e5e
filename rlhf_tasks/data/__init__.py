"""Human feedback as it is found, turned into validated, encoded datasets."""
