"""Fitting of predictors: sums over text in closed form, training by gradient, import of others."""
