"""The work itself: plain typed functions from parameters and input folders to output folders. No prefect here."""
