// Text to image by the Core ML packages of a bundle, in iOS 17 or later. README.md explains it.
// A test of the repository evaluates the arithmetic between `// begin` and `// end` against test vectors.

import CoreGraphics
import CoreML
import Foundation

/// sampler.json, of which an application needs this much.
struct Sampler: Decodable {
    struct Step: Decodable {
        let t: Int
        let fromZ: Float
        let fromOutput: Float

        enum CodingKeys: String, CodingKey {
            case t
            case fromZ = "from_z"
            case fromOutput = "from_output"
        }
    }

    let steps: [Step]
    let guidance: Float
}

/// manifest.json, likewise.
struct Manifest: Decodable {
    struct Port: Decodable {
        let shape: [Int]
    }

    struct Module: Decodable {
        let files: [String]
        let inputs: [String: Port]
        let outputs: [String: Port]
    }

    struct Variant: Decodable {
        let modules: [String: Module]
    }

    let conditions: Int
    let variants: [String: Variant]
}

/// A module: one package, or two of which the second takes by name what the first gives.
struct Program {
    let module: Manifest.Module
    let models: [MLModel]

    /// Opens the compiled packages, `.mlmodelc` in the place of `.mlpackage`.
    init(_ module: Manifest.Module, in bundle: URL) async throws {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = .cpuAndNeuralEngine
        var models: [MLModel] = []
        for file in module.files {
            let package = bundle.appendingPathComponent(file)
            let compiled = package.deletingPathExtension().appendingPathExtension("mlmodelc")
            models.append(try await MLModel.load(contentsOf: compiled, configuration: configuration))
        }
        self.module = module
        self.models = models
    }

    /// The module's output in C order. Core ML computes it in float16.
    func run(_ inputs: [String: MLFeatureValue]) throws -> [Float] {
        var values = inputs
        for model in models {
            let names = model.modelDescription.inputDescriptionsByName.keys
            let taken = values.filter { names.contains($0.key) }
            let given = try model.prediction(from: MLDictionaryFeatureProvider(dictionary: taken))
            for name in given.featureNames {
                values[name] = given.featureValue(for: name)
            }
        }
        guard let name = module.outputs.keys.first, let output = values[name]?.multiArrayValue else {
            throw CocoaError(.featureUnsupported)
        }
        return MLShapedArray<Float>(converting: output).scalars
    }

    /// Numbers for a port of floating point other than `t`.
    func half(_ numbers: [Float], port: String) -> MLFeatureValue {
        let shape = module.inputs[port]!.shape
        return MLFeatureValue(shapedArray: MLShapedArray<Float16>(scalars: numbers.map { Float16($0) }, shape: shape))
    }
}

/// The caption's token ids as the text encoder takes them. `empty` are those of the empty caption in
/// vectors.json: start, end, then padding. `ids` are the tokenizer's, whether it cuts and pads or not.
func fitted(_ ids: [Int32], empty: [Int32]) -> [Int32] {
    let last = empty.count - 1
    let end = empty[1]
    let padding = empty[last]
    return empty.indices.map { i -> Int32 in
        // begin fitted
        let id = i >= ids.count ? padding : i == last && ids.count > empty.count ? end : ids[i]
        // end fitted
        return id
    }
}

/// Unit Gaussian noise. A generator with a seed makes pictures that can be drawn again.
func gaussian(_ count: Int, using generator: inout some RandomNumberGenerator) -> [Float] {
    (0..<count).map { _ -> Float in
        let u = 1 - Double.random(in: 0..<1, using: &generator)
        let v = Double.random(in: 0..<1, using: &generator)
        // begin gaussian
        let normal = sqrt(-2 * log(u)) * cos(2 * Double.pi * v)
        // end gaussian
        return Float(normal)
    }
}

/// Where a step lands (SnapFusion Eq. 2, 3). `outputs` are the UNet's of the empty caption, then of the caption.
func land(_ z: [Float], outputs: [Float], w: Float, step: Sampler.Step) -> [Float] {
    z.indices.map { i -> Float in
        // begin land
        let uncond = outputs[i]
        let cond = outputs[z.count + i]
        let output = w * cond - (w - 1) * uncond
        let landed = step.fromZ * z[i] + step.fromOutput * output
        // end land
        return landed
    }
}

/// An image [1,3,H,W] in 0 ... 1 as rows of bytes R, G, B, 255.
func rgba(_ image: [Float]) -> [UInt8] {
    let size = image.count / 3
    var bytes = [UInt8](repeating: 255, count: 4 * size)
    for i in 0..<size {
        for channel in 0..<3 {
            // begin rgba
            let level = (255 * image[channel * size + i]).rounded(.toNearestOrEven)
            bytes[4 * i + channel] = UInt8(max(0, min(255, level)))
            // end rgba
        }
    }
    return bytes
}

/// c of the empty caption, then of the caption. The text encoder is closed when this returns.
func encode(_ rows: [[Int32]], variant: Manifest.Variant, in bundle: URL) async throws -> [Float] {
    let textEncoder = try await Program(variant.modules["text_encoder"]!, in: bundle)
    let shape = textEncoder.module.inputs["token_ids"]!.shape
    return try rows.flatMap { row -> [Float] in
        let ids = MLShapedArray<Int32>(scalars: row, shape: shape)
        return try textEncoder.run(["token_ids": MLFeatureValue(shapedArray: ids)])
    }
}

/// The steps from noise to the latent. The UNet is closed when this returns.
func walk(
    from noise: [Float], c: [Float], sampler: Sampler, manifest: Manifest, variant: Manifest.Variant, in bundle: URL
) async throws -> [Float] {
    let unet = try await Program(variant.modules["unet"]!, in: bundle)
    // begin part: one call with both conditions, or one for each
    let part = c.count / 2 * manifest.conditions
    // end part
    var z = noise
    for step in sampler.steps {
        let t = MLFeatureValue(shapedArray: MLShapedArray<Float>(scalars: [Float(step.t)], shape: [1]))
        let outputs = try stride(from: 0, to: c.count, by: part).flatMap { first -> [Float] in
            let condition = unet.half(Array(c[first..<first + part]), port: "c")
            return try unet.run(["z_t": unet.half(z, port: "z_t"), "t": t, "c": condition])
        }
        z = land(z, outputs: outputs, w: sampler.guidance, step: step)
    }
    return z
}

/// The image of a caption, [1,3,H,W] in 0 ... 1.
///
/// - Parameters:
///   - ids: of the empty caption and of the caption, each fitted.
///   - noise: unit Gaussian, as many numbers as the UNet's `z_t` has.
///   - name: of the variant, such as "coreml".
///   - bundle: its folder, with the packages compiled.
func draw(ids: [[Int32]], noise: [Float], variant name: String, in bundle: URL) async throws -> [Float] {
    let manifest = try parsed(Manifest.self, "manifest.json", in: bundle)
    let sampler = try parsed(Sampler.self, "sampler.json", in: bundle)
    let variant = manifest.variants[name]!
    let c = try await encode(ids, variant: variant, in: bundle)
    let latent = try await walk(
        from: noise, c: c, sampler: sampler, manifest: manifest, variant: variant, in: bundle)
    let decoder = try await Program(variant.modules["decoder"]!, in: bundle)
    return try decoder.run(["latent": decoder.half(latent, port: "latent")])
}

func parsed<Value: Decodable>(_ type: Value.Type, _ name: String, in bundle: URL) throws -> Value {
    try JSONDecoder().decode(type, from: Data(contentsOf: bundle.appendingPathComponent(name)))
}

/// A picture to show, of the bytes of `rgba`.
func picture(_ bytes: [UInt8], width: Int, height: Int) -> CGImage? {
    guard let space = CGColorSpace(name: CGColorSpace.sRGB), let provider = CGDataProvider(data: Data(bytes) as CFData)
    else { return nil }
    return CGImage(
        width: width, height: height, bitsPerComponent: 8, bitsPerPixel: 32, bytesPerRow: 4 * width, space: space,
        bitmapInfo: CGBitmapInfo(rawValue: CGImageAlphaInfo.noneSkipLast.rawValue), provider: provider, decode: nil,
        shouldInterpolate: false, intent: .defaultIntent)
}
