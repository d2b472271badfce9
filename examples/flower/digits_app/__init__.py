"""Handwritten digits, personalized with pFedPara on Flower."""
