from train.report import describe_fit


def test_overfitting_is_said_where_chance_does_not_explain_it():
    assert "overfits" in describe_fit(1.0, 200, 0.8, 200)
    assert "no sign of overfitting" in describe_fit(0.94, 1000, 0.9, 1000)  # too little
    assert "no sign of overfitting" in describe_fit(1.0, 20, 0.9, 10)  # too few images to tell
