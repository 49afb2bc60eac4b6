"""Graders of calculations: where a response ends, final answers and numbers, on cases made by hand."""

from fractions import Fraction

import pytest

from scores.answers import answer_part, answers_equal, boxed, final_answer, grade, is_correct, number
from scores.programs import mbpp_program

# ---------------------------------------------------------------------------------------------------------------------
# Where a response ends

NEXT_TURNS = [
    "\n\n### Instruction:\nNext\n\n### Response:\n", "### Input:\n", "\n### Response:\n", "\n### Human: Next",
    "\n### User\n", "\nBelow is an instruction that describes a task.", "<|im_end|>\n<|im_start|>user\n",
    "<|endoftext|>", "<|eot_id|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>", "<eos>", "<end_of_turn>\n",
    " [INST] Next [/INST] ", "\nHuman: Next\n", "\nUSER: Next\nASSISTANT: ", "\nuser\nNext\nassistant\n", "\n[DONE]\n",
    "\nYou are an expert Python programmer, and", "\nInstruction: Next\n", "\n## Response:\n",
]  # fmt: skip


@pytest.mark.parametrize("mark", NEXT_TURNS)
def test_an_answer_ends_where_the_next_turn_begins(mark):
    text, ended = answer_part("It is 18." + mark + "It is 3.", ended=False)
    assert (text.rstrip(), ended) == ("It is 18.", True)
    assert final_answer("It is 18." + mark + "It is 3.", ended=False) == "18"  # for this answer has ended
    assert final_answer("Hm." + mark + "#### 18") is None  # nothing was answered before
    program = "def f():\n    return 18\n"
    assert mbpp_program(program + mark + program.replace("18", "3")) == program


NEXT_QUESTIONS = [
    "\nQuestion: How many are 2 and 1?\nAnswer: ", " Question: How many?\n", "\n\nQ: How many?\nA: ",
    "\nProblem 2:\n", "\nExercise 2:\n", "\n\n**Question 2:** How many?\n", "\n## Next Question\nHow many?\n",
    "assistant\n\n", "user\n\nHow many?assistant\n\n", "\n###\nHow many?\n", "\nQ2. How many?\n",
    "\nProblem 2. How many?\n", "\nQUESTION: How many?\n", "\n## Example 2\nHow many?\n",
    "\nFollow-up question: How many?\n",
]  # fmt: skip


@pytest.mark.parametrize("mark", NEXT_QUESTIONS)
def test_an_answer_ends_where_the_next_question_begins(mark):
    assert final_answer("It is 18." + mark + "It is 3.") == "18"
    assert final_answer(r"\boxed{18}" + mark + r"\boxed{3}") == "18"
    assert final_answer("Hm, 2." + mark + "#### 18") == "2"


def test_the_question_said_again_is_not_a_next_question():
    for begin in ("Sure! Let us see.\n\n**Problem:** 9 * 2?\n\n**Solution:** ", "### Solution\n\nQuestion: 9 * 2?\n"):
        for answer in ("It is 18.", "#### 18", r"\boxed{18}"):
            assert final_answer(begin + answer) == "18", begin


def test_the_prompt_said_again_is_not_a_next_turn():
    for begin in ("### Response:\n", "assistant\n", "<|im_start|>assistant\n", "[/INST] ", "Question: 9 * 2?\nA: "):
        assert final_answer(begin + "It is 18.") == "18", begin
    assert mbpp_program("[BEGIN]\nx = 1\n[DONE]\nx = 2\n") == "x = 1\n"
    for text in ("#### Input\n18", "He asked: Question 18", "as a user\n18", "a <| b |> c: 18\n"):  # these only look so
        assert final_answer(text) == "18", text


def test_thoughts_are_not_looked_at():
    thought = "\\boxed{17}\n#### 17\nThe answer is 17.\n"
    for text in ("<think>\n{}</think>\n\nIt is 18.", "{}</think>It is 18.", "<think>{}</think>It is 18.<think>{}",
                 "<thought>{}</thought>It is 18.", "[THINK]{}[/THINK]It is 18.",
                 "<|begin_of_thought|>{}<|end_of_thought|>\n\n<|begin_of_solution|>\nIt is 18.\n<|end_of_solution|>{}",
                 "It <THINKING>{}</THINKING> is <reasoning>3</reasoning>18."):  # fmt: skip
        assert final_answer(text.format(thought, thought)) == "18", text
    assert final_answer("<think>It is 18.\n#### 18") is None  # it never came to an answer
    assert final_answer("<think>It is 18.</think>\n#### 17") == "17"
    program = 'def f(text):\n    return text.split("</think>")[-1], "<think>"\n'
    assert mbpp_program(f"```python\n{program}```") == program


# ---------------------------------------------------------------------------------------------------------------------
# Mathematics


@pytest.mark.parametrize(
    "text, answer",
    [
        ("She has <<5-2=3>>3 left.\n#### 3", "3"),
        ("#### 1,234", "1,234"),
        ("####72", "72"),
        ("so #### $18.00 \n\n", "$18.00"),
        ("#### 5\nNo, wait.\n#### 6\n", "6"),  # taken back
        ("#### 5\nI hope that helps, ask me 2 more.", "5"),
        ("#### 5\n\nA robe takes 2 and 1 bolts. How many?\n#### 3", "5"),  # the first, as GSM8K's own grader takes
        ("#### 5 #### 5 #### 7", "5"),
        ("#### 5\nWait, that is wrong: it is 6.", "6"),
        ("#### 12 (twelve)", "12"),
        ("#### 12(twelve).", "12"),
        ("#### 12 (3 * 4)\nDone.", "12"),
        ("#### 12, since 3 * 4 = 12", "12"),
        ("#### 12 个", "12"),
        ("#### 12. I hope that helps.", "12"),
        ("#### The answer is 18", "18"),
        ("#### So, the final answer is $18.", "$18."),
        ("#### Answer: 18 dollars", "18 dollars"),
        ("#### 12, so it is 12", "12"),
        ("#### 12 \u2713", "12"),
        (r"#### $\boxed{18}$", "18"),
        (r"#### The answer is \boxed{x^2}.", "x^2"),
        ("#### 1, -2", "1, -2"),
        (r"#### 0, \frac{1}{2}", r"0, \frac{1}{2}"),
        (r"#### 3 \text{ and } 5", r"3 \text{ and } 5"),
        ("#### 2 x + 1", "2 x + 1"),
        ("#### 2(x+1)", "2(x+1)"),
        ("#### 12 + 6", "12 + 6"),
        ("#### 12-18", "12-18"),
        ("#### 12 million", "12 million"),
        ("#### 12:30", "12:30"),
        ("#### x = 3/2 (or 1.5)", "x = 3/2"),
        ("#### 18 dollars", "18 dollars"),
        ("#### Step 1: add\n2 + 2 = 4", "4"),  # a heading of Markdown
        ("#### 1. Add\n2 + 2 = 4\n#### 2. Answer\nIt is 4.", "4"),
        ("#### Answer\nThus \\boxed{9}", "9"),
        ("#### Tuesday", "Tuesday"),
        ("####\n7", "7"),
        (r"First \boxed{3}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{x^{2}+\{1\}} and 7 more", r"x^{2}+\{1\}"),
        (r"\boxed{\left\{ 2x \right.} and 7 more", r"\left\{ 2x \right."),
        (r"$\boxed{ \text{even} }$ for 4", r"\text{even}"),
        (r"\boxed{12} but \boxed{unclosed 5", "12"),
        (r"\boxed{12}. The answer is 13.", "12"),
        (r"\fbox{3x}", "3x"),
        (r"so $x = \boxed 3$ for 2 of them", "3"),
        (r"\boxed{3} in \boxed form", "3"),
        (r"\boxed{1 + \boxed{2}} or \boxed{{4}", "2"),
        ("The answer is 42.", "42"),
        ("The answer is 42. I checked it 2 times.", "42"),
        ("The answer is therefore 42, in 2 steps.", "42"),
        ("The answer will be about **42**, in 2 steps.", "42"),
        ("The answer is $$42$$ in 2 steps.", "42"),
        (r"The answer is $\$42$ in 2 steps.", r"\$42"),
        ("The final answer is $x^2+1$. I hope it is correct.", "x^2+1"),
        (r"The answer is \(2\sqrt{3}\), about 3.46.", r"2\sqrt{3}"),
        (r"The answer is $16 \times $2 = $32.", "$32"),
        (r"The answer is \(n^2 \times 2 = 18\).", "18"),
        (r"The answer is $\approx 3.5$.", "3.5"),
        ("The answer is 3 1/2.", "3 1/2"),
        (r"It takes $3\frac{1}{2}$ hours.", r"$3\frac{1}{2}"),
        ("**Final Answer:** $42$, in 3 steps", "$42"),
        ("The answer is:\n\n\\(42\\)\n\nafter 2 steps", "42"),
        ("The answer is 41. No, the answer is 42. 3 steps.", "42"),
        ("The answer is 6 * 7 = 42.", "42"),
        ("The answer is 41 or 42.", "42"),
        ("Answer: She has 16 - 7 = 9. 9 * 2 = 18.", "18"),
        ("If the answer is 18, 1 is lost, so it is 17.", "17"),
        ("Suppose the answer is 18, so 1 is lost: it is 17.", "17"),
        ("Some say the answer is 18. But it is 17.", "17"),
        ("It costs $1,200.50.", "$1,200.50"),
        ("10-3", "3"),
        ("10 - 3", "3"),
        ("x = -3", "-3"),
        ("x = \u22123", "\u22123"),
        ("a loss of -$5", "-$5"),
        ("- 3 apples\n- 4 pears", "4"),
        ("half, that is 1/2.", "1/2"),
        (r"\frac{3}{4} of it", r"\frac{3}{4}"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("She has 1 000 eggs.", "1 000"),
        ("It is $1{,}000$.", "$1{,}000"),
        (r"so $12\,345.5$ kg", r"$12\,345.5"),
        ("in 2020 there were 500", "500"),
        ("about .5", ".5"),
        ("1e3 of them", "1e3"),
        ("**18**", "18"),
        ("no idea", None),
        ("", None),
        (" \n", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        ("16 - 7 = 9, 9 * 2 = 18", None),
        ("16 - 7 = 9\n#### 18", "18"),
        ("so \\boxed{18}. To check, 16 - 7 =", "18"),
        ("9 * 2 = 18, so the answer is 18. To check, 16 - 7 = 9", "18"),
        ("The answer is not 18", None),
        ("The answer is 9 * 2 = 1", None),
        ("<think>\n16 - 7 = 9 eggs. The answer is 18? Let me check", None),
        ("#### Step 18", None),
    ],
)
def test_of_an_answer_that_was_cut_the_last_number_is_none(text, answer):
    assert final_answer(text, ended=False) == answer == grade(text, ["#### 18"], ended=False)["answer"]
    assert is_correct(text, ["#### 18"], ended=False) is (answer == "18")


def test_no_number_and_boxed_alone():
    assert boxed("nothing") is None and boxed(r"\boxed{}") == "" and final_answer("nothing") is None
    assert final_answer(r"\boxed{} 5") == "5"  # an empty box is no answer


@pytest.mark.parametrize(
    "text, value",
    [
        ("18", 18), ("-18", -18), ("+18", 18), ("\u221218", -18), ("018", 18), ("18.", 18), ("18.0", 18),
        ("18.50", "37/2"),
        (".5", "1/2"), ("1,234", 1234), ("1,234,567.25", "4938269/4"), ("109,200,000", 109200000), ("1{,}234", 1234),
        ("1,000", 1000), (r"1\,000", 1000), ("1 000", 1000), (r"1,\!000", 1000), (r"1\ 000", 1000), ("1~000", 1000),
        ("1\u202f000", 1000), ("1\u00a0000", 1000), (r"1\text{,}000", 1000), (r"1{\,}000", 1000),
        (r"12\,345\,678", 12345678), (r"\$1\;000.50\text{ each}", "2001/2"), ("-1 000 m", -1000),
        (r"11,\! 111,\! 111", 11111111), (r"5~\textrm{cm}", 5), (r"\textit{5}", 5), (r"\displaystyle\frac12", "1/2"),
        (r"\frac{1{,}000}{3}", "1000/3"), ("1 300/400", "7/4"), ("1.000", 1), ("5cm", 5), ("5cm^2", 5), ("18元", 18),
        ("$18", 18), ("$ 18.00", 18), ("-$5", -5), ("$-5", -5), (r"\$1,000", 1000), ("€7", 7), ("£7", 7), ("$18$", 18),
        (r"\(18\)", 18),
        ("25%", 25), (r"25\%", 25), ("12 apples", 12), ("5 square feet", 5), ("60 km/h", 60), ("3 m^2", 3),
        ("18 dollars.", 18),
        (r"5\text{ cm}", 5), (r"90^\circ", 90), ("90°", 90), ("1e3", 1000), ("1.5E-2", "3/200"),
        (r"1.5 \times 10^{3}", 1500), ("2 x 10^-2", "1/50"), ("3/4", "3/4"), ("6/8", "3/4"), ("1 3/4", "7/4"),
        ("-3/4", "-3/4"),
        (r"\frac{3}{4}", "3/4"), (r"\dfrac{3}{4}", "3/4"), (r"\frac34", "3/4"), (r"-\frac{1}{2}", "-1/2"),
        ("0.1", "1/10"),
        ("9*2=18", 18), (r"9 \times 2 = \$18", 18), (r"\frac{36}{2} = 18", 18), ("= 18", 18), ("f(2) = 18", 18),
        (r"\text{Total cost} = \$18", 18), ("a_{10} = 18", 18), (r"\angle ABC = 18^\circ", 18),
        (r"P(A)=\frac12", "1/2"), ("18$", 18), (r"18\$", 18), ("18 €", 18), ("18¢", 18),
        (r"18 \quad \text{dollars}", 18),
        (r"1\frac{1}{2}", "3/2"), (r"\frac{1,000}{3}", "1000/3"), ("x = 3", 3), ("x=-3", -3), ("**7**", 7), ("{7}", 7),
    ],
)  # fmt: skip
def test_number(text, value):
    assert number(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    ["5x", "3ab", "2π", "3x^2", r"\frac{1}{2}x", "18 million", "3 dozen", "18 and a half", "3(x+1)", "3 (x+1)",
     "1,00", "1{,}00", r"1\,00", "1 00", "1,0000", "0,500", "1,000,00", "1, 000", "1000 000", r"1,000\,000",
     "", "many", "1,2", "12,34", "1.2.3", "10:30", "1/0", r"\frac{1}{0}", r"\frac{a}{b}", r"\frac{}{2}", "x^2",
     "3x = 4y", "x^2 + y^2 = 4", "9 = 3x", "18 = 9*2", "--3", "+-3",
     "3 apples and 4 pears", "Step 1", "1. Add them", "(1, 2)", "1e9999", "9" * 5000, "2.e2", "$", "-", "2 + 2",
     "nan", "inf"],
)  # fmt: skip
def test_no_number(text):
    assert number(text) is None


@pytest.mark.parametrize(
    "answer, reference, same",
    [
        ("0.5", "1/2", True), ("0.333", "1/3", False), ("$1,000.00", "1000", True), ("18", "18.0001", False),
        ("50%", "50", True), ("18 apples", "18", True), ("-18", "18", False), ("1e3", "1000", True),
        ("18", "eighteen", False),
        ("1,00", "100", False), (r"1\,00", "100", False), ("1.000", "1000", False), (r"1\,000", "1{,}000", True),
        ("5x", "5", False), ("5x", "5y", False), ("(1{,}000, 2)", "(1000, 2)", True),
        ("x^2+1", "x^{2}+1", True), (r"\sqrt2", r"\sqrt{2}", True), (r"3\sqrt x", r"3\sqrt{x}", True),
        (r"\sqrt[3]2", r"\sqrt[3]{2}", True), (r"\frac\pi2", r"\frac{\pi}{2}", True), ("x_1", "x_{1}", True),
        (r"\frac{x}2", r"\tfrac x2", True), (r"e^\pi", r"e^{\pi}", True), ("x^{-1}", "x^-1", True),
        ("x^10", "x^{10}", True),
        ("x^{2y}", "x^2y", False), ("x^{2+1}", "x^2+1", False), (r"\sqrt{23}", r"\sqrt23", False), ("x^2", "x2", False),
        (r"\sqrt{2}", "2", False), (r"\sqrt{2}", r"\sqrt{3}", False),
        ("even", r"\text{Even}", True), ("x + 1", "x+1", True), ("x+1", "x+2", False), ("Tuesday.", "tuesday", True),
        (r"12\pi \, \text{cm}^2", r"12\pi", True), (r"12\pi\ \mathrm{cm}", r"12\pi", True), ("5 = x", "3 = x", False),
        ("C", r"\text{(C)}", True), ("(C)", r"\text{(D)}", False), (r"x \in [-2,7]", "[-2, 7]", True),
        (r"x \in [-2,7]", "[-2, 8]", False), ("f(x) = 2x+3", "2x + 3", True), ("x^2+y^2=4", "4", False),
        (r"12\pi\text{ cm}^2", r"12\pi", True), (r"3\text{ or }x", "3", False), (r"\text{ even}", "odd", False),
        ("y = 2x+3", "2x + 3", True), (r"\sqrt{2}", r"x=\sqrt2", True), ("x = 1, y = 2", "y = 2", False),
        (r"\begin{pmatrix} -7 \\ 16 \end{pmatrix}", r"\begin{pmatrix}-7\\16\end{pmatrix}", True),
        (r"\left( 1, 2 \right)", "(1,2)", True), ("10:30", "10:3", False), ("0.1", "0.10000000000000001", False),
    ],
)  # fmt: skip
def test_answers_equal(answer, reference, same):
    assert answers_equal(answer, reference) is same and answers_equal(reference, answer) is same


def test_is_correct():
    reference = "She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18"
    for right in ("#### 18", "#### $18.00", r"\boxed{18}", "So it is 18 dollars.", "36/2", reference):
        assert is_correct(right, [reference])
    for wrong in ("#### 19", "18 minus 1 is 17", r"18, so \boxed{17}", "", "eighteen", "-18", "#### 1.8", "#### 180",
                  "#### 17\n\n### Instruction:\nNext\n\n### Response:\n#### 18", "#### 17\n\nWhat is 9 * 2?\n#### 18",
                  "The answer is 17. (It would be 18 without the loss.)", "#### 18\nWait, no. It is 17.", "#### 18/2",
                  "#### 18 million", "#### 18-20", r"\boxed{18x}", "<think>#### 18</think>"):  # fmt: skip
        assert not is_correct(wrong, [reference])
    assert is_correct("It is 4.", ["#### 3", "4"]) and is_correct(r"\boxed{Even}", ["even"])
    assert is_correct(r"\boxed{x^2 + 1}", ["x^{2}+1"]) and not is_correct(r"\boxed{x^2 + 1}", ["x^2"])
    with pytest.raises(ValueError, match="no final answer"):
        is_correct("3", [" "])
