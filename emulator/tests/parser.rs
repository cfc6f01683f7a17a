//! What the PTX parser makes of every form it must know, and of text that is not PTX.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cuda::ptx::ast::{Function, Init, Instruction, Loc, Module, Operand, Space, Statement, Ty, Variable};
use cuda::ptx::parse;

const HEADER: &str = ".version 8.0\n.target sm_80\n.address_size 64\n";

fn module(text: &str) -> Module {
    parse(&format!("{HEADER}{text}")).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// The statements of a kernel with this body, which begins in line 5.
fn body(text: &str) -> Vec<Statement> {
    module(&format!(".entry k() {{\n{text}\n}}")).functions.remove(0).body.expect("a body")
}

fn instructions(text: &str) -> Vec<Instruction> {
    body(text)
        .into_iter()
        .map(|statement| match statement {
            Statement::Instruction(instruction) => *instruction,
            other => panic!("{other:?}"),
        })
        .collect()
}

fn instruction(text: &str) -> Instruction {
    let mut all = instructions(text);
    assert_eq!(all.len(), 1, "{text}");
    all.remove(0)
}

fn operands(text: &str) -> Vec<Operand> {
    instruction(text).operands
}

/// The message for a body that must not parse.
fn refused(text: &str) -> String {
    match parse(&format!("{HEADER}.entry k() {{\n{text}\n}}")) {
        Ok(module) => panic!("accepted: {text}\n{module:?}"),
        Err(error) => error.to_string(),
    }
}

/// The message for module-level text (from line 4) that must not parse.
fn refused_module(text: &str) -> String {
    match parse(&format!("{HEADER}{text}")) {
        Ok(module) => panic!("accepted: {text}\n{module:?}"),
        Err(error) => error.to_string(),
    }
}

fn name(name: &str) -> Operand {
    Operand::Name(name.to_owned())
}

fn int(value: i64) -> Operand {
    Operand::Int { bits: value as u64, negative: value < 0 }
}

fn at(base: &str, offset: i64) -> Operand {
    Operand::Address { base: Some(base.to_owned()), offset }
}

fn vector<const N: usize>(items: [&str; N]) -> Operand {
    Operand::Vector(items.map(name).to_vec())
}

fn pair(first: Operand, second: Operand) -> Operand {
    Operand::Pair(Box::new(first), Box::new(second))
}

fn variable(space: Space, name: &str, ty: Ty, align: u64, size: u64) -> Variable {
    Variable { space, name: name.to_owned(), ty, align, size, external: false, init: Vec::new(), line: 4 }
}

fn register(ty: Ty, name: &str, count: Option<u32>) -> Statement {
    Statement::Register { ty, name: name.to_owned(), count, line: 5 }
}

fn label(name: &str, line: u32) -> Statement {
    Statement::Label { name: name.to_owned(), line }
}

/// The only variable of a module.
fn only(text: &str) -> Variable {
    let mut module = module(text);
    assert_eq!(module.variables.len(), 1, "{text}");
    module.variables.remove(0)
}

fn bits(values: &[u64]) -> Vec<Init> {
    values.iter().map(|&value| Init::Bits(value)).collect()
}

// ---------------------------------------------------------------- whole files

/// Every `kernel.ptx` below the test cases and below `EMU_PTX_DIR`, and the other PTX of the tests.
fn samples() -> Vec<PathBuf> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut found = vec![tests.join("ptx/forms.ptx")];
    for folder in [Some(tests.join("cases")), std::env::var_os("EMU_PTX_DIR").map(PathBuf::from)] {
        for entry in folder.into_iter().flat_map(|folder| folder.read_dir().expect("a folder of cases")) {
            let kernel = entry.expect("a case").path().join("kernel.ptx");
            if kernel.is_file() {
                found.push(kernel);
            }
        }
    }
    found
}

fn count(statements: &[Statement]) -> usize {
    statements
        .iter()
        .map(|statement| match statement {
            Statement::Instruction(_) => 1,
            Statement::Block(inner) => count(inner),
            _ => 0,
        })
        .sum()
}

/// What stands between the semicolons of nvcc's text and begins with a letter or a guard is an instruction.
fn instructions_by_semicolon(text: &str) -> usize {
    let without_sections = text.split("\t.section").next().unwrap_or_default();
    let lines: Vec<&str> = without_sections
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .filter(|line| !line.trim_start().starts_with(".loc\t") && !line.trim_start().starts_with(".file"))
        .collect();
    lines
        .join("\n")
        .split(';')
        .filter(|piece| {
            // A header ends where its body begins, on a line of its own.
            let piece = if piece.contains(".entry") || piece.contains(".func") {
                piece.split_once("\n{").map_or("", |(_, body)| body)
            } else {
                piece
            };
            let mut rest = piece.trim_start_matches(['{', '}', ' ', '\t', '\n']);
            while let Some((word, after)) = rest.split_once(':') {
                if after.starts_with(':') || word.contains(['.', ',', '[']) {
                    break;
                }
                rest = after.trim_start_matches(['{', '}', ' ', '\t', '\n']);
            }
            rest.starts_with(|first: char| first.is_ascii_alphabetic() || first == '@')
        })
        .count()
}

#[test]
fn samples_parse_completely() {
    let samples = samples();
    assert!(samples.len() >= 6);
    for path in samples {
        let text = std::fs::read_to_string(&path).unwrap();
        let module = parse(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(module.functions.iter().any(|function| function.kernel && function.body.is_some()));
        let found: usize = module.functions.iter().filter_map(|f| f.body.as_deref()).map(count).sum();
        assert_eq!(found, instructions_by_semicolon(&text), "{}", path.display());
    }
}

#[test]
fn a_large_kernel_is_parsed_in_milliseconds() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases/misc_warp/kernel.ptx");
    let text = std::fs::read_to_string(path).unwrap();
    // The best of several, for the machine may be busy.
    let best = (0..10)
        .map(|_| {
            let start = Instant::now();
            parse(&text).unwrap();
            start.elapsed()
        })
        .min()
        .unwrap();
    assert!(best < Duration::from_millis(20), "{best:?}");
}

#[test]
fn nvcc_calls_tables_and_inline_assembly() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ptx/forms.ptx");
    let module = parse(&std::fs::read_to_string(path).unwrap()).unwrap();
    let many = module.function("many").expect("the kernel");
    assert_eq!((many.kernel, many.maxntid, many.minnctapersm), (true, Some([128, 1, 1]), Some(2)));
    assert_eq!((many.params[1].ty, many.params[1].size, many.params[1].align), (Ty::B8, 468, 4));
    let vprintf = module.function("vprintf").expect("a declaration");
    assert!(
        !vprintf.kernel && vprintf.body.is_none() && vprintf.params.len() == 2 && vprintf.returns.len() == 1
    );
    assert!(
        module.function("_Z2f1i").unwrap().body.is_some(),
        "the definition, not the declaration before it"
    );
    let find = |name: &str| module.variables.iter().find(|variable| variable.name == name).unwrap();
    assert_eq!(find("wide").init, bits(&[u64::MAX]));
    assert_eq!(find("ptr").init, [Init::Symbol { name: "table".to_owned(), offset: 8, generic: true }]);
    assert_eq!(
        find("fns").init,
        ["_Z2g1i", "_Z2g2i"].map(|name| Init::Symbol { name: name.to_owned(), offset: 0, generic: false })
    );
    assert_eq!(find("lut").space, Space::Const);
    assert!(find("dyn").external && find("dyn").size == 0 && find("dyn").align == 16);
}

#[test]
fn header_directives() {
    let module = parse("\n\n// c\n.version 8.10\n.target sm_90a, debug\n.address_size 64\n").unwrap();
    assert_eq!((module.version, module.target.as_str()), ((8, 10), "sm_90a"));
    assert!(parse("").unwrap_err().to_string().contains(".version"));
    assert_eq!(parse("\nhello").unwrap_err().line, 2);
    assert!(parse(".version 8\n").is_err());
    assert!(parse(".version 8.0\n.target sm_80\n.address_size 32\n").unwrap_err().to_string().contains("64"));
}

#[test]
fn text_ends_at_nul_and_lines_may_end_in_cr_lf() {
    let text = format!("{HEADER}.entry k()\n{{\nret;\n}}\n");
    let expected = parse(&text).unwrap();
    assert_eq!(parse(&format!("{text}\0 {{ garbage")).unwrap(), expected);
    assert_eq!(parse(&text.replace('\n', "\r\n")).unwrap(), expected);
}

#[test]
fn comments_and_strange_bytes_in_them() {
    let module = module(
        "/* a\n * { ; \u{fffd} */ .entry k() // \u{fffd}é \"\n{ ret; /**/ exit; /* // */ }\n# 1 \"x.cu\"\n",
    );
    let Some([Statement::Instruction(first), Statement::Instruction(second)]) =
        module.functions[0].body.as_deref()
    else {
        panic!("{module:?}");
    };
    assert_eq!((first.opcode.as_str(), first.line, second.opcode.as_str()), ("ret", 6, "exit"));
    assert!(refused_module("/* never ends").contains("line 4"));
    assert!(refused_module(".pragma \"x\n\";").contains("line 4"));
    assert!(refused("\u{fffd}").contains("line 5"));
}

#[test]
fn files_and_locations() {
    let module = module(
        ".entry k() {\nret;\n.loc 1 73 5\nret;\n.loc\t2 21 3, function_name $L__info_string0, inlined_at 1 73 77\nret;ret;\n\
         .loc 1 30 1, function_name $L__info_string0+12, inlined_at 1 7 7\nret; }\n.entry n() { ret; }\n\
         .file\t1 \"a \\\"b\\\".cu\"\n.file 2 \"x.cuh\", 1700000000, 4096\n.section\t.debug_str\n{\n$L__info_string0:\n\
         .b8 95,0 // }\n.b64 .debug_info+5\n.4byte { } -1\n}\n",
    );
    assert_eq!(module.files, [(1, "a \\\"b\\\".cu".to_owned()), (2, "x.cuh".to_owned())]);
    let places = |function: &Function| -> Vec<(u32, Loc)> {
        let body = function.body.as_deref().unwrap();
        body.iter()
            .map(|statement| match statement {
                Statement::Instruction(instruction) => (instruction.line, instruction.loc),
                other => panic!("{other:?}"),
            })
            .collect()
    };
    let loc = |file, line| Loc { file, line };
    let expected = [(5, loc(0, 0)), (7, loc(1, 73)), (9, loc(2, 21)), (9, loc(2, 21)), (11, loc(1, 30))];
    assert_eq!(places(&module.functions[0]), expected);
    // A location does not reach into the next function.
    assert_eq!(places(&module.functions[1]), [(12, loc(0, 0))]);
    assert!(refused_module("\n.section .debug_str {\n{}\n").contains("line 5"));
}

#[test]
fn aliases_stand_for_functions() {
    let module = module(".func f() { ret; }\n.visible .func g();\n.alias g, f;");
    assert_eq!(module.aliases, [("g".to_owned(), "f".to_owned())]);
    assert_eq!(module.function("g").map(|function| function.name.as_str()), Some("f"));
    assert_eq!(module.function("h"), None);
}

// ---------------------------------------------------------------- functions

#[test]
fn entries_and_their_parameters() {
    let module = module(
        ".visible .entry _Z1k$x(\n.param .u64 a,\n\t.param .u64 .ptr .global .align 1 b,\n.param .align 8 .b8 c[464],\n\
         .param .f32 d, .param .u64 .ptr .align 16 e\n)\n.maxntid 128, 2\n.minnctapersm 2 .maxnreg 64\n.noreturn\n{\n}",
    );
    let parameter =
        |name, ty, align, size, line| Variable { line, ..variable(Space::Param, name, ty, align, size) };
    let expected = Function {
        name: "_Z1k$x".to_owned(),
        kernel: true,
        params: vec![
            parameter("a", Ty::U64, 8, 8, 5),
            parameter("b", Ty::U64, 8, 8, 6),
            parameter("c", Ty::B8, 8, 464, 7),
            parameter("d", Ty::F32, 4, 4, 8),
            parameter("e", Ty::U64, 8, 8, 8),
        ],
        returns: Vec::new(),
        maxntid: Some([128, 2, 1]),
        reqntid: None,
        minnctapersm: Some(2),
        maxnreg: Some(64),
        body: Some(Vec::new()),
        line: 4,
    };
    assert_eq!(module.functions, [expected]);
}

#[test]
fn entry_directives() {
    let function = module(".weak .entry k\n.reqntid 32 .pragma \"nounroll\", \"x\"; .maxclusterrank 8 { }")
        .functions
        .remove(0);
    assert_eq!((function.reqntid, function.maxntid, function.params.len()), (Some([32, 1, 1]), None, 0));
    module(".entry k() .reqnctapercluster 1, 1, 1 { }");
    assert!(refused_module(".entry k() .reqnctapercluster 2 { }").contains("clusters"));
    assert!(refused_module("\n.entry k()\n.explicitcluster { }").contains("line 6"));
    assert!(refused_module(".entry k() .nonsense 3 { }").contains("nonsense"));
    assert!(refused_module(".entry k(.reg .b32 a) { }").contains("param"));
    assert!(refused_module(".entry k(.param .b8 a[]) { }").contains("size"));
}

#[test]
fn device_functions() {
    let module = module(
        ".func (.param .b32 func_retval0) f(.param .b32 p0, .param .align 16 .b8 p1[32]) { ret; }\n\
         .extern .func (.param .b32 r) vprintf\n(\n.param .b64 a,\n.param .b64 b\n)\n;\n\
         .func (.reg .b32 %out) old(.reg .f32 %in, .reg .pred %p) { ret; }\n\
         .extern .func __assertfail(.param .b64 _, .param .b64 _) .noreturn;\n\
         .weak .func .attribute(.unified(1, (2))) bare { }",
    );
    let names: Vec<_> = module
        .functions
        .iter()
        .map(|f| (f.name.as_str(), f.kernel, f.returns.len(), f.params.len(), f.body.is_some()))
        .collect();
    assert_eq!(
        names,
        [
            ("f", false, 1, 2, true),
            ("vprintf", false, 1, 2, false),
            ("old", false, 1, 2, true),
            ("__assertfail", false, 0, 2, false),
            ("bare", false, 0, 0, true),
        ]
    );
    assert_eq!(module.functions[0].returns, [variable(Space::Param, "func_retval0", Ty::B32, 4, 4)]);
    let old = &module.functions[2];
    assert_eq!((old.params[0].space, old.params[0].ty), (Space::Generic, Ty::F32));
    assert_eq!(old.returns[0].space, Space::Generic);
    assert!(refused_module(".entry (.param .b32 r) k() { }").contains("returns nothing"));
}

// ---------------------------------------------------------------- variables

#[test]
fn variables_of_a_module() {
    assert_eq!(only(".global .align 1 .b8 _ZN$iter[1];"), variable(Space::Global, "_ZN$iter", Ty::B8, 1, 1));
    assert_eq!(only(".shared .align 128 .b8 s[8192];"), variable(Space::Shared, "s", Ty::B8, 128, 8192));
    assert_eq!(only(".visible .const .f32 c[3][4];"), variable(Space::Const, "c", Ty::F32, 4, 48));
    assert_eq!(only(".shared::cta .u64 s;"), variable(Space::Shared, "s", Ty::U64, 8, 8));
    assert_eq!(only(".global .v4 .f32 v[2];"), variable(Space::Global, "v", Ty::F32, 16, 32));
    assert_eq!(
        only(".global .attribute(.managed) .align 4 .u32 m;"),
        variable(Space::Global, "m", Ty::U32, 4, 4)
    );
    assert_eq!(
        only(".extern .shared .align 16 .b8 name[];"),
        Variable { external: true, ..variable(Space::Shared, "name", Ty::B8, 16, 0) }
    );
    assert_eq!(
        module(".global .b32 a, b[2], c;").variables.iter().map(|v| v.size).collect::<Vec<_>>(),
        [4, 8, 4]
    );
    assert!(!only(".common .global .u32 x;").external);
}

#[test]
fn initialisers() {
    assert_eq!(only(".global .u32 x = 5;").init, bits(&[5]));
    assert_eq!(only(".global .u8 x[4] = {255, -1, 0x10, 0b11};").init, bits(&[255, 255, 16, 3]));
    assert_eq!(only(".const .s16 x[2] = {-2, 1};").init, bits(&[0xfffe, 1]));
    assert_eq!(only(".const .u64 x = -1;").init, bits(&[u64::MAX]));
    assert_eq!(only(".global .f32 x[2] = {1.5, 0f3F800000};").init, bits(&[0x3fc0_0000, 0x3f80_0000]));
    assert_eq!(
        only(".global .f64 x[2] = {0d3FF0000000000000, -0.5};").init,
        bits(&[1.0_f64.to_bits(), (-0.5_f64).to_bits()])
    );
    assert_eq!(only(".global .b32 x = 0f3F800000;").init, bits(&[0x3f80_0000]));
    assert_eq!(only(".global .u32 x = (1 << 4) | 3;").init, bits(&[19]));
    assert_eq!(only(".global .u32 x = WARP_SZ * 2;").init, bits(&[64]));
    // Fewer numbers than elements: the rest of a row is zero, and so is the rest of the variable.
    assert_eq!(only(".global .b32 x[2][2] = {{1}, {2, 3}};").init, bits(&[1, 0, 2, 3]));
    assert_eq!(only(".global .b32 x[9] = {1, 2};").init, bits(&[1, 2]));
    assert_eq!(only(".global .v2 .b32 x[2] = {{1, 2}, {3, 4}};").init, bits(&[1, 2, 3, 4]));
    let open = only(".global .b32 x[][2] = {{1}, {2, 3}, {4}};");
    assert_eq!((open.size, open.init), (24, bits(&[1, 0, 2, 3, 4, 0])));
    let text = only(".global .b8 x[] = \"a\\n\\\"\";");
    assert_eq!((text.size, text.init), (4, bits(&[97, 10, 34, 0])));
    assert_eq!(only(".global .b8 x[8] = \"ab\";").init, bits(&[97, 98, 0]));
    let symbol = |name: &str, offset, generic| Init::Symbol { name: name.to_owned(), offset, generic };
    assert_eq!(
        only(".global .u64 x[4] = {a, a+8, generic(b), generic(b)+-4};").init,
        [symbol("a", 0, false), symbol("a", 8, false), symbol("b", 0, true), symbol("b", -4, true)]
    );
}

#[test]
fn variables_that_are_refused() {
    for (text, word) in [
        (".global .u32 x = 1.0;", "float"),
        (".global .f32 x = 1;", "integer"),
        (".global .u32 x[1] = {1, 2};", "more initialisers"),
        (".global .u32 x = {{1}};", "braces"),
        (".global .u32 x[2] = {{{1}}};", "braces"),
        (".global .u8 x = y;", "address"),
        (".global .b8 x[2] = \"abc\";", "longer"),
        (".global .u32 x = \"abc\";", "bytes"),
        (".global .b8 x[4] = {0xFF(y), 0, 0, 0};", "not supported"),
        (".shared .u32 x = 1;", "initialisers"),
        (".global .align 3 .b8 x;", "power of two"),
        (".global .b8 x[];", "no size"),
        (".global .b8 x[1073741824][1073741824];", "larger"),
        (".global .b8 x[4294967296][4294967296][0];", "larger"),
        (".global .b8 x[0][4294967296][4294967296] = {{1}};", "initialiser"),
        (".const .b8 x[65537];", "larger"),
        (".global .b32 x[2][9999999] = {{1}, {2}};", "initialiser"),
        (".global .pred x;", "predicate"),
        (".global .f32 .u32 x;", "second type"),
        (".global .texref x;", "texref"),
        (".global x;", "type"),
        (".global .u32 5;", "name"),
        (".global .u32 x", "end of the text"),
        (".u32 x;", "not a directive"),
        ("mov.u32 a, b;", "directive"),
    ] {
        let error = refused_module(text);
        assert!(error.starts_with("line 4: ") && error.contains(word), "{text}: {error}");
    }
}

#[test]
fn variables_of_a_body() {
    let variables: Vec<Variable> = body(
        ".local .align 16 .b8 __local_depot0[48]; .shared .f32 s[33][32]; .param .b64 param0;\n.param .align 8 .b8 r[16];",
    )
    .into_iter()
    .map(|statement| match statement {
        Statement::Variable(variable) => variable,
        other => panic!("{other:?}"),
    })
    .collect();
    let on = |line, variable| Variable { line, ..variable };
    assert_eq!(
        variables,
        [
            on(5, variable(Space::Local, "__local_depot0", Ty::B8, 16, 48)),
            on(5, variable(Space::Shared, "s", Ty::F32, 4, 4224)),
            on(5, variable(Space::Param, "param0", Ty::B64, 8, 8)),
            on(6, variable(Space::Param, "r", Ty::B8, 8, 16)),
        ]
    );
}

#[test]
fn registers() {
    assert_eq!(
        body(".reg .b32 %r<10>; .reg.b16 lo, hi; .reg .pred \t%p<2>, q;"),
        [
            register(Ty::B32, "%r", Some(10)),
            register(Ty::B16, "lo", None),
            register(Ty::B16, "hi", None),
            register(Ty::Pred, "%p", Some(2)),
            register(Ty::Pred, "q", None),
        ]
    );
    for text in [
        ".reg .b32 %r<4000000000>;",
        ".reg .b32 %r<99999999999999>;",
        ".reg .b32 %r<-1>;",
        ".reg .b32 %r<x>;",
    ] {
        assert!(refused(text).contains("line 5"), "{text}");
    }
    // Many small declarations add up.
    assert!(refused(&".reg .b32 %r<1000000>;\n".repeat(2)).contains("registers"));
    assert!(refused(".reg .v4 .f32 v;").contains("vector"));
}

#[test]
fn blocks_shadow_and_end() {
    let statements = body("{ .reg .b32 a; { ret; } L: }\n{ // callseq 0, 0\n}");
    let [Statement::Block(first), Statement::Block(second)] = &statements[..] else {
        panic!("{statements:?}")
    };
    assert_eq!(first[0], register(Ty::B32, "a", None));
    assert!(matches!(&first[1], Statement::Block(inner) if inner.len() == 1));
    assert_eq!(first[2], label("L", 5));
    assert!(second.is_empty());
    body(&format!("{}{}", "{".repeat(60), "}".repeat(60)));
    assert!(refused(&format!("{}{}", "{".repeat(100), "}".repeat(100))).contains("nested"));
    assert!(refused(&"{".repeat(1 << 20)).contains("nested"));
    assert!(refused("{ ret;").contains("end of the text"));
    assert!(refused("ret; }\n}").contains("directive"));
}

#[test]
fn labels() {
    assert_eq!(body("$L__BB0_2:\nL1: L2:"), [label("$L__BB0_2", 5), label("L1", 6), label("L2", 6)]);
    let statements = body("LAB_WAIT: bra.uni DONE; DONE:");
    assert_eq!((&statements[0], &statements[2]), (&label("LAB_WAIT", 5), &label("DONE", 5)));
    assert!(matches!(&statements[1], Statement::Instruction(bra) if bra.operands == [name("DONE")]));
}

#[test]
fn branch_targets_and_prototypes() {
    assert_eq!(
        body(
            "ts: .branchtargets\n\t$L1,\n\t$L2;\nprototype_7 : .callprototype (.param .b32 _) _ (.param .b32 _, .param .b8 _[4]) ;\n\
             fs: .calltargets f, g;"
        ),
        [
            Statement::BranchTargets {
                name: "ts".to_owned(),
                labels: vec!["$L1".to_owned(), "$L2".to_owned()],
                line: 5
            },
            Statement::CallPrototype { name: "prototype_7".to_owned(), line: 8 },
            Statement::CallPrototype { name: "fs".to_owned(), line: 9 },
        ]
    );
    assert!(refused("p: .callprototype _ ()").contains('}'));
}

// ---------------------------------------------------------------- instructions

#[test]
fn an_instruction_in_full() {
    assert_eq!(
        instruction(
            "\n @!%p1 ld.global.L1::no_allocate.L2::256B.v4.f32  {%f1, %f2,\n\t%f3,%f4} , // why\n [%rd1+-24] ;"
        ),
        Instruction {
            guard: Some(("%p1".to_owned(), true)),
            opcode: "ld".to_owned(),
            modifiers: ["global", "L1::no_allocate", "L2::256B", "v4", "f32"].map(str::to_owned).to_vec(),
            operands: vec![vector(["%f1", "%f2", "%f3", "%f4"]), at("%rd1", -24)],
            line: 6,
            loc: Loc::default(),
            text: "ld.global.L1::no_allocate.L2::256B.v4.f32 {%f1, %f2, %f3,%f4} , [%rd1+-24]".to_owned(),
        }
    );
}

#[test]
fn opcodes_and_modifiers() {
    let words = |text: &str| {
        let instruction = instruction(text);
        format!("{}|{}", instruction.opcode, instruction.modifiers.join("|"))
    };
    assert_eq!(words("ret;"), "ret|");
    assert_eq!(words("bra.uni L;"), "bra|uni");
    assert_eq!(words("mov .u32 a, b;"), "mov|u32");
    assert_eq!(words("ld.shared::cta.b32 a, [b];"), "ld|shared::cta|b32");
    assert_eq!(
        words("cp.async.cg.shared.global.L2::128B [a], [b], 16;"),
        "cp|async|cg|shared|global|L2::128B"
    );
    assert_eq!(
        words("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {a,b,c,d}, [e];"),
        "ldmatrix|sync|aligned|m8n8|x4|trans|shared|b16"
    );
    assert_eq!(
        words("mbarrier.try_wait.parity.shared::cta.b64 p, [a], b;"),
        "mbarrier|try_wait|parity|shared::cta|b64"
    );
    assert_eq!(
        words("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {a}, {b}, {c}, {d};"),
        "mma|sync|aligned|m16n8k16|row|col|f32|bf16|bf16|f32"
    );
}

#[test]
fn guards() {
    let guard = |text: &str| instruction(text).guard;
    assert_eq!(guard("@%p1 bra $L;"), Some(("%p1".to_owned(), false)));
    assert_eq!(guard("@ ! p bra $L;"), Some(("p".to_owned(), true)));
    assert_eq!(guard("bra $L;"), None);
    assert_eq!(instruction("@!q trap;").text, "trap");
    assert!(refused("@5 bra L;").contains("predicate"));
}

#[test]
fn names() {
    assert_eq!(
        operands("mov.u32 %r1, %tid.x;"),
        [name("%r1"), name("%tid.x")],
        "the dot of a special register belongs to its name"
    );
    assert_eq!(operands("mov.u64 %a$b_1, $sym$1;"), [name("%a$b_1"), name("$sym$1")]);
    assert_eq!(operands("mov.u32 x, WARP_SZ;"), [name("x"), name("WARP_SZ")]);
    assert_eq!(operands("f.b32 _, __x;"), [Operand::Sink, name("__x")]);
    let long = "x".repeat(5000);
    assert_eq!(operands(&format!("mov.b64 %rd1, {long};")), [name("%rd1"), name(&long)]);
}

#[test]
fn integer_immediates() {
    let value = |text: &str| operands(&format!("mov.b64 a, {text};")).remove(1);
    for (text, expected) in [
        ("0", 0),
        ("5", 5),
        ("-5", -5),
        ("- 5", -5),
        ("0x1F", 31),
        ("0XfF", 255),
        ("-0x10", -16),
        ("0b101", 5),
        ("017", 15),
        ("10U", 10),
        ("0x5410U", 0x5410),
        ("9223372036854775807", i64::MAX),
        ("(1<<4)", 16),
        ("(1 << 4) + 2 * 3 - 1", 21),
        ("~1", -2),
        ("!0", 1),
        ("+7", 7),
        ("-7 / 2", -3),
        ("-7 % 4", -3),
        ("-16 >> 2", -4),
        ("1 < 2 && 3 >= 3", 1),
        ("6 & 3 ^ 8 | 16", 26),
        ("2 == 2 || 1 != 1", 1),
        ("(2 > 3) + (2 <= 3)", 1),
        ("(.s64) 3", 3),
    ] {
        // A minus sign in front marks the operand as it is written; otherwise the value decides.
        let negative = expected < 0 || text.starts_with('-');
        assert_eq!(value(text), Operand::Int { bits: expected as u64, negative }, "{text}");
    }
    for (text, expected) in [
        ("0xFFFFFFFFFFFFFFFF", u64::MAX),
        ("18446744073709551615", u64::MAX),
        ("0xFFFFFFFF", 0xffff_ffff),
        ("0x8000000000000000U", 1 << 63),
        ("(.u64)0 - 16 >> 60", 15),
    ] {
        assert_eq!(value(text), Operand::Int { bits: expected, negative: false }, "{text}");
    }
}

#[test]
fn float_immediates() {
    let value = |text: &str| operands(&format!("mov.f32 a, {text};")).remove(1);
    assert_eq!(value("0f3F800000"), Operand::F32(0x3f80_0000));
    assert_eq!(value("0Fff800000"), Operand::F32(0xff80_0000));
    assert_eq!(value("0d3FF0000000000000"), Operand::F64(1.0_f64.to_bits()));
    assert_eq!(value("0D7ff0000000000000"), Operand::F64(f64::INFINITY.to_bits()));
    for (text, expected) in
        [("1.0", 1.0), ("-1.5", -1.5), ("1e5", 1e5), ("2.5E-3", 2.5e-3), ("1.e+2", 100.0), (".5", 0.5)]
    {
        assert_eq!(value(text), Operand::F64(f64::to_bits(expected)), "{text}");
    }
}

#[test]
fn immediates_that_are_refused() {
    for text in [
        "08",
        "0x",
        "0b2",
        "0f3F80000",
        "0f3F8000000",
        "0d3FF00000",
        "12ab",
        "1.5U",
        "0x10u",
        "18446744073709551616",
        "1 / 0",
        "1 % 0",
        "1.0 + 1",
        "~1.0",
        "1e",
        "1..2",
        "(1",
        "-",
        "5 5",
    ] {
        let error = refused(&format!("mov.b32 a, {text};"));
        assert!(error.starts_with("line 5: "), "{text}: {error}");
    }
    assert!(refused(&format!("mov.b32 a, {}1;", "(".repeat(100_000))).contains("nested"));
    assert!(refused(&format!("mov.b32 a, {}1;", "-".repeat(100_000))).contains("nested"));
}

#[test]
fn addresses() {
    let address = |text: &str| operands(&format!("ld.global.u32 a, {text};")).remove(1);
    assert_eq!(address("[%rd1]"), at("%rd1", 0));
    assert_eq!(address("[%rd1+-24]"), at("%rd1", -24));
    assert_eq!(address("[%rd1+16]"), at("%rd1", 16));
    assert_eq!(address("[%rd1-16]"), at("%rd1", -16));
    assert_eq!(address("[ %r45 + 0 ]"), at("%r45", 0));
    assert_eq!(address("[ %r45 + 0x10 ]"), at("%r45", 16));
    assert_eq!(address("[name+8]"), at("name", 8));
    assert_eq!(address("[k_param_0+4*2]"), at("k_param_0", 8));
    assert_eq!(address("[s+(1<<4)+-4]"), at("s", 12));
    assert_eq!(address("[16]"), Operand::Address { base: None, offset: 16 });
    assert_eq!(address("[-8]"), Operand::Address { base: None, offset: -8 });
    for text in ["[]", "[%rd1", "[%rd1+]", "[%rd1+%rd2]", "[%rd1, {%r1}]", "[%rd1+1.0]", "[{a}]", "%rd1]"] {
        assert!(refused(&format!("ld.global.u32 a, {text};")).starts_with("line 5"), "{text}");
    }
}

#[test]
fn composed_operands() {
    assert_eq!(operands("mov.b32 {a,b}, c;"), [vector(["a", "b"]), name("c")]);
    assert_eq!(
        operands("mov.b32 {_, %rs1}, %r1;"),
        [Operand::Vector(vec![Operand::Sink, name("%rs1")]), name("%r1")]
    );
    assert_eq!(operands("ld.global.v2.u32 {%r1,%r2},[%rd1];"), [vector(["%r1", "%r2"]), at("%rd1", 0)]);
    assert_eq!(
        operands("st.global.v2.f32 [a], {0f00000000, %f1};"),
        [at("a", 0), Operand::Vector(vec![Operand::F32(0), name("%f1")])]
    );
    assert_eq!(
        operands("setp.lt.and.s32 p|q, a, b, !c;"),
        [pair(name("p"), name("q")), name("a"), name("b"), Operand::Not("c".to_owned())]
    );
    assert_eq!(
        operands("shfl.sync.bfly.b32 %r1|%p1, %r2, 16, 31, -1;"),
        [pair(name("%r1"), name("%p1")), name("%r2"), int(16), int(31), int(-1)]
    );
    assert_eq!(operands("elect.sync _|%p1, -1;"), [pair(Operand::Sink, name("%p1")), int(-1)]);
    assert_eq!(operands("match.all.sync.b32 d | _, a, m;")[0], pair(name("d"), Operand::Sink));
    assert_eq!(operands("mov.u64 a, s+8;"), [name("a"), Operand::Sum { name: "s".to_owned(), offset: 8 }]);
    assert_eq!(
        operands("mov.u64 a, s + -8;"),
        [name("a"), Operand::Sum { name: "s".to_owned(), offset: -8 }]
    );
    assert_eq!(operands("bar.sync 0, 64;"), [int(0), int(64)]);
    assert_eq!(operands("brx.idx %r1, $L_brx_0;"), [name("%r1"), name("$L_brx_0")]);
    assert_eq!(operands("prefetch.global.L2 [%rd1+64];"), [at("%rd1", 64)]);
    assert_eq!(
        operands("createpolicy.fractional.L2::evict_first.b64 %rd1, 1.0;"),
        [name("%rd1"), Operand::F64(1.0_f64.to_bits())]
    );
}

#[test]
fn calls() {
    let list = |items: &[Operand]| Operand::List(items.to_vec());
    assert_eq!(
        operands("call.uni (ret), f, (p0, p1);"),
        [list(&[name("ret")]), name("f"), list(&[name("p0"), name("p1")])]
    );
    assert_eq!(
        operands("call (ret), %rd1, (p), prototype_0;"),
        [list(&[name("ret")]), name("%rd1"), list(&[name("p")]), name("prototype_0")]
    );
    let call = instruction("call.uni \n\t__assertfail, \n\t(\n\tp0, \n\t5\n\t);");
    assert_eq!(call.operands, [name("__assertfail"), list(&[name("p0"), int(5)])]);
    assert_eq!(call.text, "call.uni __assertfail, ( p0, 5 )");
    assert_eq!(call.line, 5);
    assert_eq!(operands("call f;"), [name("f")]);
    assert_eq!(operands("call f, ();"), [name("f"), list(&[])]);
}

#[test]
fn errors_name_the_line() {
    for (text, line, word) in [
        ("ret", 6, "found `}`"),
        ("mov.u32 a, b\nadd.u32 a, a, b;", 6, "found `add.u32`"),
        ("ret;\nmov.u32 a,;", 6, "operand"),
        ("\n\nmov.u32 a b;", 7, "found `b`"),
        ("mov.u32 {a, {b}}, c;", 5, "operand"),
        ("mov.u32 {a, b, c;", 5, "vector"),
        (".global;", 5, "type"),
        (".weird 5;", 5, "weird"),
        ("\n.loc 1 2 3, nonsense 4", 6, "nonsense"),
        ("setp.eq.s32 p|5, a, b;", 5, "destination"),
        ("call (a, f;", 5, "list"),
        ("5:", 5, "statement"),
        ("ld..u32 a, b;", 5, "operand"),
    ] {
        let error = refused(text);
        assert!(error.starts_with(&format!("line {line}: ")) && error.contains(word), "{text}: {error}");
    }
    // A long token is cut in the message.
    assert!(refused(&format!("mov a {};", "x".repeat(10_000))).len() < 200);
}
